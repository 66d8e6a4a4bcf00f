"""Stripe-wise pruning: skeletons, and which stripes a budget of MACs costs.

Source: Meng et al., Pruning Filter in Filter, NeurIPS 2020.
"""
