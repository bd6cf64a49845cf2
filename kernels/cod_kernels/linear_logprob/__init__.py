"""Log-probs of chosen tokens from hidden states and the output head; see README.md."""
