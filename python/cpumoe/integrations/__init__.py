"""Hosts: one package per model runtime, imported by nobody but the command line and the user."""
