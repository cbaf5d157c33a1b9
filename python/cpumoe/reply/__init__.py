"""Splits a model's reply into reasoning, answer and tool calls."""

from cpumoe.reply.derive import reply_format

__all__ = ["reply_format"]
