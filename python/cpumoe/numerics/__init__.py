"""The arithmetic of experts in PyTorch, independent of the C++, and bounds on its errors."""
