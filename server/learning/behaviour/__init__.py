"""What people did with answers, as weighed votes: how much a signal says, and how far its user can be trusted. It knows
stored feedback and texts, and neither models nor profiles."""
