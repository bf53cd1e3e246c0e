"""Supervised training: packing with isolated samples, and the trainer with balance and MTP losses."""
