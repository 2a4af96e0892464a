"""fastlora beside other projects; nothing else in the package knows them."""
