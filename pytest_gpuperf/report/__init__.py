"""What people read: terminal, Markdown, HTML and exports, all pure functions of results."""
