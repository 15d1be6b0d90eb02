"""Make the built-in tiny CLIPs again, and measure what they know: ``ftfast pretrain``."""
