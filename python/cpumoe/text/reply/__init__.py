"""Splits a model's reply into reasoning, answer and tool calls."""

from cpumoe.text.reply.derive import reply_format

__all__ = ["reply_format"]
