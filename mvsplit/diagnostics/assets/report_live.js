"use strict";
/* Asks the server for news, again and again, and says how the runs are. */
(() => {
  const EVERY = 1000, // milliseconds between an answer and the next question
    AFTER_SILENCE = 5000;
  const status = Report.make("span", { cls: "live", role: "status" });
  document.querySelector(".bar-inner").insertBefore(status, Report.$("theme"));
  let token = Report.token,
    latest = null; // when the last news came

  function say() {
    const all = (word) => Report.runs.every((run) => run.status === word);
    if (all("waiting")) status.textContent = "waiting for the run to begin";
    else if (all("ended")) status.textContent = "ended";
    else if (latest && Date.now() - latest > 60_000)
      status.textContent = `no news for ${Math.floor((Date.now() - latest) / 60_000)} min`;
    else status.textContent = "live";
  }
  async function ask() {
    const began = Date.now();
    const answer = await fetch(`/news?known=${encodeURIComponent(token)}`);
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    if (answer.status === 200) {
      const news = await answer.json();
      await Page.renew(news);
      token = news.token;
      latest = Date.now();
    }
    say();
    return Math.max(EVERY, 2 * (Date.now() - began)); // two thirds of the time are left to the run
  }
  async function follow() {
    let wait = EVERY;
    try {
      if (!document.hidden) wait = await ask();
    } catch (error) {
      status.textContent = `no answer: is mvsplit still watching? (${error.message})`;
      wait = AFTER_SILENCE;
    }
    setTimeout(follow, wait);
  }
  latest = Date.now();
  say();
  setTimeout(follow, EVERY);
})();
