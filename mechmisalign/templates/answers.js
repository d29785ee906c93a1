// The answer browser of a report: filters, sorts and opens the answers that are embedded beside it.
//
// What a model wrote is data: it enters the page as text nodes alone, never as markup. This script asks nothing of the
// network, and the page's policy, which knows it by its hash, lets no other script run.
"use strict";

(function () {
  const PAGE_ROWS = 20;
  const EXCERPT = 320; // characters of an answer in its closed row, where the style sheet cuts it to two lines
  const MARKS = 300; // words that a search marks in one text, at most
  const NO_SCORE = "–";

  document.querySelectorAll(".browser").forEach(browse);

  function browse(box, number) {
    const data = JSON.parse(box.querySelector(".data").textContent);
    const answers = data.answers.map((row, index) => readAnswer(data, row, `answer-${number + 1}-${index + 1}`));
    const columns = columnsOf(data);
    const view = { column: null, direction: 1, page: 0, needle: "", matching: answers, opened: new Set() };

    const filters = makeFilters(data, refilter);
    const count = make("p", { class: "count", role: "status" });
    const heads = columns.map((column) => makeHead(column, () => sortBy(column)));
    const body = make("tbody");
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
    const previous = make("button", { type: "button" }, "‹ Previous");
    const next = make("button", { type: "button" }, "Next ›");
    const place = make("span");
    const pager = make("p", { class: "pager" }, previous, place, next);
    previous.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));

    box.querySelector(".preview").replaceWith(filters.element, count, table, pager);
    box.classList.add("live");
    refilter();

    function refilter() {
      const wanted = filters.read();
      view.needle = wanted.needle;
      view.matching = answers.filter((answer) => fits(answer, wanted));
      view.page = 0;
      draw();
    }

    function sortBy(column) {
      view.direction = view.column === column ? -view.direction : 1;
      view.column = column;
      view.page = 0;
      heads.forEach((head, i) => {
        const order = view.direction > 0 ? "ascending" : "descending";
        head.setAttribute("aria-sort", columns[i] === column ? order : "none");
      });
      draw();
    }

    function turn(step) {
      view.page += step;
      draw();
      if (table.getBoundingClientRect().top < 0) table.scrollIntoView({ block: "start", behavior: "instant" });
    }

    function draw() {
      const sorted = view.column ? sortedBy(view.matching, view.column.key, view.direction) : view.matching;
      const pages = Math.max(1, Math.ceil(sorted.length / PAGE_ROWS));
      const first = view.page * PAGE_ROWS;
      const shown = sorted.slice(first, first + PAGE_ROWS);
      body.replaceChildren(...shown.flatMap(rowsOf));
      const range = shown.length ? `; shown are ${written(first + 1)} to ${written(first + shown.length)}` : "";
      count.textContent = `${written(sorted.length)} of ${written(answers.length)} answers match${range}.`;
      place.textContent = `page ${written(view.page + 1)} of ${written(pages)}`;
      previous.disabled = view.page === 0;
      next.disabled = view.page >= pages - 1;
      pager.hidden = pages === 1;
    }

    // The row of an answer, and below it the whole exchange if it is open.
    function rowsOf(answer) {
      const isOpen = view.opened.has(answer);
      const button = make("button", { type: "button", class: "open" }, data.conditions[answer.condition]);
      const row = make("tr", { class: "row" }, make("td", {}, button));
      columns.slice(1).forEach((column) => row.append(column.cell(answer, view.needle)));
      row.addEventListener("click", (event) => {
        if (event.target.closest("button") || !String(window.getSelection())) toggle(); // words may be selected
      });
      tellState(isOpen);
      return isOpen ? [row, opened()] : [row];

      function toggle() {
        const opens = !view.opened.delete(answer);
        if (opens) {
          view.opened.add(answer);
          row.after(opened());
        } else {
          row.nextElementSibling.remove();
        }
        tellState(opens);
      }

      function tellState(open) {
        button.setAttribute("aria-expanded", String(open));
        if (open) button.setAttribute("aria-controls", answer.id);
        else button.removeAttribute("aria-controls");
      }

      function opened() {
        const cell = make("td", { colspan: columns.length }, ...exchange(data, answer, view.needle));
        return make("tr", { class: "whole", id: answer.id }, cell);
      }
    }
  }

  function readAnswer(data, row, id) {
    const [condition, label, question, response, scores, facts] = row;
    const turns = data.questions[question];
    const prompt = turns[turns.length - 1][1];
    const told = [...turns.map((spoken) => spoken[1]), response, ...facts.filter((fact) => fact !== null)];
    return { id, condition, label, turns, prompt, response, scores, facts, searched: told.join("\n").toLowerCase() };
  }

  // The columns: what each is sorted by, and its cell.
  function columnsOf(data) {
    const scores = data.rubrics.slice(0, 2).map((name, i) => ({
      name,
      number: true,
      key: (answer) => (typeof answer.scores[i] === "number" ? answer.scores[i] : null),
      cell: (answer) => make("td", { class: "number", title: name }, score(answer.scores[i])),
    }));
    return [
      { name: data.by, key: (answer) => answer.condition },
      {
        name: "class",
        key: (answer) => answer.label,
        cell: (answer) => make("td", { class: `class ${data.labels[answer.label][1]}` }, data.labels[answer.label][0]),
      },
      ...scores,
      {
        name: "length",
        number: true,
        key: (answer) => answer.response.length,
        cell: (answer) => make("td", { class: "number", title: "characters" }, written(answer.response.length)),
      },
      {
        name: "question and answer",
        cell: (answer, needle) =>
          make(
            "td",
            { class: "said-in-short" },
            make("div", { class: "asked", dir: "auto" }, ...marked(excerpt(answer.prompt, needle), needle)),
            make("div", { class: "answered", dir: "auto" }, ...marked(excerpt(answer.response, needle), needle)),
          ),
      },
    ];
  }

  function makeHead(column, sort) {
    const head = make("th", { scope: "col", class: column.number ? "number" : "" });
    if (!column.key) {
      head.append(column.name);
      return head;
    }
    const button = make("button", { type: "button" }, column.name);
    button.addEventListener("click", sort);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    return head;
  }

  // The filters: their element, and read(), what they ask for now.
  function makeFilters(data, changed) {
    const condition = makeChoice(data.by, data.conditions);
    const label = makeChoice("class", data.labels.map(([name]) => name));
    const wordsIn = "words in question or answer";
    const search = make("input", { type: "search", "aria-label": wordsIn, spellcheck: "false", autocomplete: "off" });
    const ranges = data.rubrics.map((name) => [makeBound(`${name} from`, "0"), makeBound(`${name} to`, "100")]);
    const clear = make("button", { type: "button" }, "Clear");
    const element = make(
      "div",
      { class: "filters", role: "group", "aria-label": "Filters" },
      labelled(data.by, condition),
      labelled("class", label),
      make("label", { class: "search" }, make("span", {}, wordsIn), search),
      ...ranges.map(([from, to], i) =>
        make("div", { class: "range" }, make("span", {}, data.rubrics[i]), make("div", {}, from, " to ", to)),
      ),
      clear,
    );
    element.addEventListener("input", changed);
    clear.addEventListener("click", () => {
      element.querySelectorAll("input, select").forEach((input) => (input.value = ""));
      changed();
    });
    return { element, read };

    function read() {
      return {
        condition: condition.value === "" ? null : Number(condition.value),
        label: label.value === "" ? null : Number(label.value),
        needle: search.value.trim().toLowerCase(),
        ranges: ranges.map(([from, to]) => [bound(from), bound(to)]),
      };
    }
  }

  function fits(answer, wanted) {
    return (
      (wanted.condition === null || answer.condition === wanted.condition) &&
      (wanted.label === null || answer.label === wanted.label) &&
      answer.searched.includes(wanted.needle) &&
      wanted.ranges.every(([from, to], i) => within(answer.scores[i], from, to))
    );
  }

  // An answer without a score lies in no range but the whole one.
  function within(value, from, to) {
    if (from === null && to === null) return true;
    return typeof value === "number" && (from === null || value >= from) && (to === null || value <= to);
  }

  // Sorted by key, those without one last in both directions; equals stay in the order of the data.
  function sortedBy(answers, key, direction) {
    return [...answers].sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (a - b);
    });
  }

  // Everything that was said before the answer, the answer, and all that is known of it.
  function exchange(data, answer, needle) {
    const [label, tone] = data.labels[answer.label];
    const before = answer.turns.map(([role, text]) => said(role, text, "plain", needle));
    const scores = data.rubrics.map((name, i) => [name, score(answer.scores[i])]);
    const facts = data.facts.map((name, i) => [name, answer.facts[i] ?? NO_SCORE]);
    const known = [["class", label], ...scores, ["length", `${written(answer.response.length)} characters`], ...facts];
    const list = known.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    const reply = said(data.conditions[answer.condition], answer.response, tone, needle);
    return [...before, reply, make("dl", { class: "known" }, ...list)];
  }

  function said(speaker, text, tone, needle) {
    const words = make("p", { dir: "auto", tabindex: "0" }, ...marked(text, needle));
    return make("div", { class: `said ${tone}` }, make("h3", {}, speaker), words);
  }

  function excerpt(text, needle) {
    const found = needle ? text.toLowerCase().indexOf(needle) : -1;
    const start = found > 100 ? found - 60 : 0;
    const cut = text.slice(start, start + EXCERPT).replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "");
    return (start ? "… " : "") + cut;
  }

  // A text as nodes, the searched words in <mark>.
  function marked(text, needle) {
    const lower = text.toLowerCase();
    if (!needle || lower.length !== text.length) return [text]; // a few letters change their length in lower case
    const nodes = [];
    let start = 0;
    let found = lower.indexOf(needle);
    while (found >= 0 && nodes.length < 2 * MARKS) {
      const end = found + needle.length;
      nodes.push(text.slice(start, found), make("mark", {}, text.slice(found, end)));
      start = end;
      found = lower.indexOf(needle, start);
    }
    return [...nodes, text.slice(start)];
  }

  function score(value) {
    if (typeof value === "number") return String(Math.round(10 * value) / 10);
    return value ?? NO_SCORE;
  }

  function written(number) {
    return number.toLocaleString("en");
  }

  function bound(input) {
    return Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber;
  }

  function makeBound(name, placeholder) {
    return make("input", { type: "number", min: "0", max: "100", step: "any", "aria-label": name, placeholder });
  }

  function makeChoice(what, names) {
    const options = names.map((name, i) => make("option", { value: i }, name));
    return make("select", { "aria-label": what }, make("option", { value: "" }, `every ${what}`), ...options);
  }

  function labelled(name, input) {
    return make("label", {}, make("span", {}, name), input);
  }

  // An element with attributes; children that are strings become text nodes.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
})();
