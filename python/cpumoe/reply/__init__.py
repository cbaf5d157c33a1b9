"""How models write reasoning, answers and tool calls into one text, and how that is taken apart."""

from cpumoe.reply.derive import reply_format

__all__ = ["reply_format"]
