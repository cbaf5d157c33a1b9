"""Integrations: one package per host of models. Only the command line and users import them."""
