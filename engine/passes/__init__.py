"""How an image is made: each request as its passes, and one pass from noise to latents."""
