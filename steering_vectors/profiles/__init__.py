"""What a profile is, what a mix of profiles adds up to, and profile files."""
