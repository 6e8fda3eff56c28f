"""What is compiled, when and why: plans, keys, components, devices and memory."""
