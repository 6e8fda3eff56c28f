"""What a prompt's text says: its pieces, their weights, and the steps at which each is there."""
