"""What every domain's training shares. Plain torch; nothing here knows what runs it."""
