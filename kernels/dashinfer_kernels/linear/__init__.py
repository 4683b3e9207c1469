"""Linear layers over weights packed for the device."""
