"""What a configuration will need: parameters, memory per GPU, forwards per buffer. No weights are read."""
