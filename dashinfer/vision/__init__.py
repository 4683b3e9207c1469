"""Images and videos of requests: fetched safely, decoded and prepared for the vision tower. In the parent, without torch."""
