"""Labels written by a language model: what it is asked, how its answers are read and filtered, how good they are."""
