"""Pretraining of the demo backbones: ``python -m trainer.pretrain gpt2|bart``."""
