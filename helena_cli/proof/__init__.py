"""`helena test`: what Helena promises, tried on the user's own machine and database."""
