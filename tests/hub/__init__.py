"""A Hugging Face Hub for the tests: real HTTP on the loopback interface, repositories on disk, faults on demand."""
