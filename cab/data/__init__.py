"""What a run trains on: images, class-balanced subsets of them, and their order."""
