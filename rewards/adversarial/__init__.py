"""Answers and requests written to be paid without being right, each beside an honest twin that must be paid."""
