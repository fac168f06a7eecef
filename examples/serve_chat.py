"""A conversation with a running server, through OpenAI's client; answers are shown as they come.

headway serve smollm2-135m-instruct    # in another terminal; OPENAI_BASE_URL names a server elsewhere
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

QUESTIONS = ["What is the capital of France?", "And of Italy?", "Which of the two is further south?"]


def main() -> None:
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    with OpenAI(base_url=url, api_key=os.environ.get("HEADWAY_API_KEY", "none")) as client:
        model = client.models.list().data[0].id
        messages: list[ChatCompletionMessageParam] = []
        for question in QUESTIONS:
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            answer = ""
            for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, temperature=0):
                piece = chunk.choices[0].delta.content or ""
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
