"""What a profile does, measured: preferences, reward, the trust suite."""
