"""Reinforcement learning: the vLLM engine, weight sync with proof, and the GRPO trainer."""
