"""Measurements of speed and accuracy: what ``cpumoe bench`` and ``cpumoe validate`` show."""
