"""The training loop and what surrounds it. It is handed models, batches and losses, and knows none of them."""
