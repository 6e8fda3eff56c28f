"""What a request gave: its images, saved as files with the request, and read back from them."""
