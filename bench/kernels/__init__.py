"""Speed, memory and correctness of the kernels beside yardsticks and peers."""
