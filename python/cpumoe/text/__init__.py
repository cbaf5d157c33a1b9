"""Text generation as commands and servers see it. This package knows no host."""
