"""Looking at adapters and runs: numbers, pictures and one page that holds them."""
