"""Entry points for other libraries; each module here imports one library, which nothing else imports."""
