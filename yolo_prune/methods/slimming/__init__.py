"""Network slimming: a penalty on batch-norm scales, its strength, its health, and its course over the epochs.

Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017.
"""
