"""The only code that touches ComfyUI's own modules; nodes reach them through here."""
