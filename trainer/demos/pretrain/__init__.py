"""Pretraining of the demo backbones: ``python -m trainer.demos.pretrain gpt2|bart``."""
