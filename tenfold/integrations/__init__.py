"""Where other people's libraries meet tenfold: the Hub, training loops, boards. Each is imported where it is used."""
