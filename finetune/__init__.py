"""Finetuning a pretrained encoder to classify clips, and everything that is done with the classifier."""
