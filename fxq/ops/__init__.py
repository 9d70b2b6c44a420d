"""The integer op families, one file each: equation, torch op, fake implementation and portable kernel together."""
