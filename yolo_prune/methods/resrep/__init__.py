"""ResRep: rows of compactors are made to forget until they are zero, and then nothing is lost with them."""
