"""Backbones: native architectures, and loading by hub id, folder or embedded name."""
