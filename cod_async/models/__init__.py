"""Models and tokenizers: the Qwen3 architecture in plain torch, Hugging Face directories, small tokenizers.

Nothing is imported here, so that readers of tokenizers do not load torch.
"""
