"""What a host may say: requests, settings, schedulers and upscalers, checked when they are made."""
