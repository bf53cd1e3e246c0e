"""Evaluation: held-out accuracy with intervals, win rates, and the calibration of the judge."""
