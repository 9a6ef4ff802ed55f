"""Talking to the Hugging Face Hub: downloads, and its errors in our words."""
