"""What a run leaves on disk, read again without torch, and the page that shows it."""
