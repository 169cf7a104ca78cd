//! The operators' page in a real browser.

mod common;

use std::time::Duration;

use common::{ALL, Program, file};
use portcullis_testing::{Backend, Browser};
use serde_json::json;

/// Opens the page and waits until it shows something.
async fn open(program: &Program) -> Browser {
    let mut browser = Browser::start().await;
    browser.open(&format!("http://{}/", program.admin)).await;
    browser.until("document.body.dataset.drawn > 0").await;
    browser
}

/// Sends requests until a breaker has opened.
async fn until_open(program: &Program, target: &str) {
    for _ in 0..500 {
        program.get(target).await;
        if program.ask("/endpoints").await.text().contains("\"condition\": \"open\"") {
            return;
        }
    }
    panic!("no breaker opens");
}

/// Nothing went wrong in the page, and nothing was asked of anybody else.
fn assert_sound(browser: &mut Browser, program: &Program) {
    assert_eq!(browser.happened("Runtime.exceptionThrown"), [json!(null); 0]);
    let complaints = browser.happened("Log.entryAdded");
    assert!(complaints.iter().all(|one| one["params"]["entry"]["level"] != "error"), "{complaints:?}");
    let own = format!("http://{}/", program.admin);
    for asked in browser.happened("Network.requestWillBeSent") {
        let url = asked["params"]["request"]["url"].as_str().unwrap_or_default();
        assert!(url.starts_with(&own) || url.starts_with("data:"), "{url}");
    }
}

/// Where a picture of the page goes, if anybody wants to look at it.
async fn picture(browser: &mut Browser, name: &str) {
    if let Some(folder) = std::env::var_os("PORTCULLIS_PICTURES") {
        let path = std::path::Path::new(&folder).join(name).with_extension("png");
        // All of it, however long it is.
        let size = browser.evaluate("[innerWidth, document.documentElement.scrollHeight]").await;
        let side = |index: usize| size[index].as_u64().and_then(|side| u32::try_from(side).ok()).unwrap_or(1280);
        browser.resize(side(0), side(1)).await;
        std::fs::write(&path, browser.picture().await).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_shows_what_happens_while_it_happens() {
    let (orders, dead, users) =
        (Backend::start("orders").await, Backend::start("dead").await, Backend::start("users").await);
    let more = "\
        limits = { few = { rate = \"2/h\" } }\n\
        [[routes]]\npath = \"/orders/{*rest}\"\nto = \"orders\"\n\
        [[routes]]\nname = \"<img src=x onerror=alert(1)>\"\npath = \"/users\"\nmethods = [\"GET\"]\n\
        to = [{ service = \"users\", weight = 3 }, { service = \"orders\", weight = 1 }]\nlimits = [\"few\"]\n";
    let services = file(&[("orders", &[orders.address(), dead.address()]), ("users", &[users.address()])], more);
    let program = Program::start(&services);
    let mut browser = open(&program).await;
    let text = async |browser: &mut Browser, of: &str| {
        let found = browser.evaluate(&format!("document.querySelector({of:?}).innerText")).await;
        found.as_str().unwrap_or_default().to_owned()
    };
    let map = text(&mut browser, "#map").await;
    for shown in ["/orders/{*rest}", "users", &orders.address().to_string(), &dead.address().to_string()] {
        assert!(map.contains(shown), "{shown} is not in {map}");
    }
    assert_eq!(browser.evaluate("document.querySelectorAll('#map path').length").await, 6, "each has its wire");
    assert!(map.contains("<img src=x"), "a name is text, not markup: {map}");
    assert_eq!(browser.evaluate("document.images.length").await, 0);
    let routes = text(&mut browser, "#routes").await;
    assert!(routes.contains("users 75 %, orders 25 %"), "{routes}");

    for _ in 0..8 {
        program.get("/orders/7").await;
        program.get("/users").await;
    }
    program.get("/nowhere").await;
    browser.until("document.querySelector('.box.hot, path.hot')").await;
    browser.until("document.querySelector('#refusals').innerText.includes('too-many-requests')").await;
    browser.until("document.querySelector('#refusals').innerText.includes('no-route')").await;
    browser.until("[...document.querySelectorAll('#routes tbody tr')][0].lastChild.innerText == '8'").await;
    browser.until("document.querySelector('#routes svg.spark path.line')").await;
    let limits = text(&mut browser, "#limits").await;
    assert!(limits.contains("few 2/h") && limits.contains("6 refused"), "{limits}");

    // Who opens it later sees what was before.
    browser.evaluate("window.isOld = true; location.reload()").await;
    browser.until("!window.isOld && document.body.dataset.drawn > 0").await;
    browser.until("history.get('all').length > 2 && document.querySelector('#chart path.line')").await;

    dead.kill().await;
    until_open(&program, "/orders/7").await;
    browser.until("document.querySelector('#map').innerText.includes('breaker open')").await;
    browser.until("document.querySelector('#events').innerText.includes('closed to open, failures')").await;
    browser.until("document.querySelector('#services').innerText.includes('breakers opened 1')").await;
    picture(&mut browser, "busy").await;
    assert_sound(&mut browser, &program);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_can_be_done_with_the_keyboard() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let mut program = Program::start(&file(&[("a", &[one.address(), two.address()])], ALL));
    let mut browser = open(&program).await;
    let focused = async |browser: &mut Browser| {
        let found = browser.evaluate("(document.activeElement.innerText || document.activeElement.id).split('\\n')[0]");
        found.await.as_str().unwrap_or_default().to_owned()
    };
    browser.press("Tab").await;
    assert_eq!(focused(&mut browser).await, "Skip to the map");
    browser.press("m").await;
    assert_eq!(focused(&mut browser).await, "/{*rest}");
    browser.press("ArrowRight").await;
    assert_eq!(focused(&mut browser).await, "a");
    browser.press("ArrowRight").await;
    browser.press("ArrowDown").await;
    assert_eq!(focused(&mut browser).await, two.address().to_string());
    // What is drawn anew gives the focus back.
    browser
        .until(&format!("document.body.dataset.drawn > {} + 2", "Number(window.was ??= document.body.dataset.drawn)"))
        .await;
    assert_eq!(focused(&mut browser).await, two.address().to_string());
    browser.press("Enter").await;
    browser.until("document.querySelectorAll('#services tbody tr').length == 1").await;
    browser.press("Escape").await;
    browser.until("document.querySelectorAll('#services tbody tr').length == 2").await;

    browser.press("?").await;
    browser.until("document.querySelector('#help').open").await;
    browser.press("Escape").await;
    browser.until("!document.querySelector('#help').open").await;
    browser.press("/").await;
    assert_eq!(focused(&mut browser).await, "find");
    browser.press("t").await;
    assert_eq!(browser.evaluate("document.documentElement.dataset.theme").await, "auto", "a letter, not an order");
    browser.press("Escape").await;
    browser.press("t").await;
    assert_eq!(browser.evaluate("document.documentElement.dataset.theme").await, "dark");
    browser.press("p").await;
    assert_eq!(browser.evaluate("document.querySelector('#pause').getAttribute('aria-pressed')").await, "true");
    browser.press("p").await;

    // Take one out, by its button.
    browser.evaluate("document.querySelector('#services tbody button').focus()").await;
    browser.press("Enter").await;
    browser.until("document.querySelector('#services').innerText.includes('held open by hand')").await;
    for _ in 0..5 {
        assert_eq!(program.get("/").await.header("x-backend"), "two");
    }
    assert_eq!(focused(&mut browser).await, "Let go", "the button that took its place");
    browser.evaluate("document.querySelector('#level').focus()").await;
    browser.press("d").await;
    browser.until("document.querySelector('#events').innerText.includes('the level is debug')").await;
    browser.evaluate("document.querySelector('#drain').focus()").await;
    browser.press("Enter").await;
    browser.until("document.querySelector('#ask').open").await;
    browser.press("Escape").await;
    browser.until("!document.querySelector('#ask').open").await;
    assert_eq!(program.ask("/ready").await.status, 200, "not without a yes");
    browser.press("Enter").await;
    browser.until("document.querySelector('#ask').open").await;
    assert_sound(&mut browser, &program);
    browser.press("Enter").await;
    assert_eq!(program.ended().await, Some(0));
    browser.until("document.querySelector('#ready').innerText == 'does not answer'").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_need_leave_and_a_token() {
    let backend = Backend::start("one").await;
    let service = [("a", &[backend.address()][..])];
    let reading = Program::start(&file(&service, &format!("admin = {{ address = \"127.0.0.1:0\" }}\n{ALL}")));
    let mut browser = open(&reading).await;
    let buttons = "[...document.querySelectorAll('main button:not(.box)')].filter(one => one.checkVisibility()).length";
    assert_eq!(browser.evaluate(buttons).await, 0, "who may only look gets nothing to press");
    assert_sound(&mut browser, &reading);

    let more = format!("admin = {{ address = \"127.0.0.1:0\", writable = true, token = \"xyzzy\" }}\n{ALL}");
    let guarded = Program::start(&file(&service, &more));
    browser.open(&format!("http://{}/", guarded.admin)).await;
    browser.until("document.querySelector('#services tbody button')").await;
    browser.evaluate("document.querySelector('#reload').click()").await;
    browser.until("document.querySelector('#ask').open && !document.querySelector('#ask-text').hidden").await;
    for letter in ["x", "y", "z", "z", "y"] {
        browser.press(letter).await;
    }
    browser.press("Enter").await;
    browser.until("document.querySelector('#events').innerText.includes('the file is in force')").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_can_be_read_in_the_dark_in_the_light_and_on_a_telephone() {
    let (one, dead) = (Backend::start("one").await, Backend::start("dead").await);
    let program = Program::start(&file(&[("a", &[one.address(), dead.address()])], ALL));
    dead.kill().await;
    until_open(&program, "/").await;
    let mut browser = open(&program).await;
    browser.until("document.querySelector('#map').innerText.includes('breaker open')").await;
    // The least contrast of any text with what is behind it, by WCAG 2.
    let contrast = r"(() => {
        const channels = color => { const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const light = color => { const [r, g, b] = channels(color).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b; };
        const behind = node => { for (; node; node = node.parentElement) { const color = getComputedStyle(node).backgroundColor;
            if (!/, 0\)$|transparent/.test(color)) return color; } return 'white'; };
        let least = { ratio: 21 };
        for (const node of document.querySelectorAll('main *, header *')) {
            const said = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
            if (!said || !node.checkVisibility() || node.closest('svg, .unseen')) continue;
            const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
            const ratio = (a + .05) / (b + .05);
            if (ratio < least.ratio) least = { ratio, text: node.innerText, of: node.className };
        }
        return least;
    })()";
    let mut backs = Vec::new();
    // As the system has it, and as somebody chose whatever the system has.
    for (system, theme) in [("light", "auto"), ("dark", "auto"), ("dark", "light"), ("light", "dark")] {
        browser.prefer("prefers-color-scheme", system).await;
        browser.evaluate(&format!("theme('{theme}')")).await;
        let least = browser.evaluate(contrast).await;
        assert!(least["ratio"].as_f64().is_some_and(|ratio| ratio >= 4.5), "{system}, {theme}: {least}");
        let back = "getComputedStyle(document.querySelector(OF)).backgroundColor";
        let of = async |browser: &mut Browser, of: &str| browser.evaluate(&back.replace("OF", of)).await;
        backs.push((of(&mut browser, "'body'").await, of(&mut browser, "'.box'").await));
        if theme == "auto" {
            picture(&mut browser, system).await;
        }
    }
    assert_ne!(backs[0], backs[1]);
    assert_eq!((&backs[0], &backs[1]), (&backs[2], &backs[3]), "boxes and all");
    browser.evaluate("theme('auto')").await;
    for width in [390, 820, 1280] {
        browser.resize(width, 844).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let over =
            browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth").await;
        assert_eq!(over, 0, "it does not fit into {width}");
        picture(&mut browser, &format!("{width}")).await;
    }
    assert_sound(&mut browser, &program);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_empty_says_so() {
    let more = "registries.r.kind = \"embedded\"\nservices.a.registry = \"r\"\n\
        [[routes]]\npath = \"/a\"\nto = \"a\"\n[[routes]]\npath = \"/b\"\nredirect = { path = \"/c\" }\n";
    let program = Program::start(&file(&[], more));
    let mut browser = open(&program).await;
    for (part, said) in [
        ("#map", "no endpoint"),
        ("#map", "redirect"),
        ("#chart", "none in the last two minutes"),
        ("#services", "no endpoint is known"),
        ("#limits", "No limits."),
    ] {
        browser.until(&format!("document.querySelector('{part}').innerText.includes('{said}')")).await;
    }
    picture(&mut browser, "empty").await;
    browser.evaluate("only('nobody')").await;
    browser.until("document.querySelector('#map').innerText.includes('nothing contains nobody')").await;
    browser.until("document.querySelector('#routes').innerText.includes('nothing contains nobody')").await;
    assert_sound(&mut browser, &program);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_endpoints_do_not_keep_it_from_being_used() {
    let many: Vec<_> = (1..=1000).map(|port| std::net::SocketAddr::from(([127, 0, 0, 1], port))).collect();
    let program = Program::start(&file(&[("a", &many)], ALL));
    let mut browser = open(&program).await;
    browser.until("document.querySelector('#services').innerText.includes('and 800 more')").await;
    assert_eq!(browser.evaluate("document.querySelectorAll('#services tbody tr').length").await, 201);
    let took = browser
        .evaluate("Math.min(...Array.from({ length: 10 }, () => { const began = performance.now(); draw(began); return performance.now() - began; }))");
    let took = took.await.as_f64().unwrap_or(f64::MAX);
    assert!(took < 900.0, "{took} ms of each second");
    browser.press("/").await;
    for letter in [":", "7", "7", "7"] {
        browser.press(letter).await;
    }
    browser.until("document.querySelectorAll('#services tbody tr').length == 1").await;
    let shown = browser.evaluate("document.querySelector('#services tbody').innerText").await;
    assert!(shown.as_str().is_some_and(|shown| shown.contains("127.0.0.1:777")), "{shown}");
    assert_sound(&mut browser, &program);
}
