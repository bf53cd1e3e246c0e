"""The policy on many processes: how weights and tokens are laid out, and how processes are started."""
