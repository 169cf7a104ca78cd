//! A real browser, driven through the [DevTools protocol](https://chromedevtools.github.io/devtools-protocol/).

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use futures::{SinkExt, StreamExt};
use serde_json::{Value as Json, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::process::{Process, scratch_folder};
use crate::program;

/// A headless Chromium with one page, and nothing kept from earlier; dropping it kills it.
#[derive(Debug)]
pub struct Browser {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Option<String>,
    next: u64,
    events: Vec<Json>,
    process: Process,
    folder: PathBuf,
}

/// How long the browser may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

impl Browser {
    /// Starts one with an empty page of 1280 × 900.
    ///
    /// # Panics
    ///
    /// With the reason, when there is none to be had, or it does not start.
    pub async fn start() -> Self {
        let folder = scratch_folder("browser");
        let installed = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"];
        let program = installed
            .iter()
            .find_map(|name| program::installed(name))
            .unwrap_or_else(|| program::find("chromium-headless-shell", "chromium-headless-shell", None));
        let mut command = program.command();
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            "--window-size=1280,900",
        ]);
        let data = folder.join("data");
        command.arg(format!("--user-data-dir={}", data.display())).arg("about:blank");
        let mut process = Process::start(command, &folder.join("log"));
        let address = || std::fs::read_to_string(data.join("DevToolsActivePort")).ok();
        process.until(async || address().is_some_and(|text| text.lines().count() == 2)).await;
        let text = address().unwrap_or_default();
        let (port, path) = text.split_once('\n').expect("a port and a path");
        let (socket, _) = tokio_tungstenite::connect_async(format!("ws://127.0.0.1:{port}{}", path.trim()))
            .await
            .unwrap_or_else(|error| panic!("the browser does not speak: {error}"));
        let mut browser = Self { socket, session: None, next: 0, events: Vec::new(), process, folder };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach).await;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Network", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser
    }

    /// Has the browser do something, and waits for what it says.
    ///
    /// # Panics
    ///
    /// When it refuses.
    pub async fn call(&mut self, method: &str, parameters: Json) -> Json {
        self.ask(method, parameters).await.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    async fn ask(&mut self, method: &str, parameters: Json) -> Result<Json, Json> {
        self.next += 1;
        let id = self.next;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.socket.send(Message::text(message.to_string())).await.expect("a browser that listens");
        let answer = tokio::time::timeout(PATIENCE, async {
            loop {
                let said = self.socket.next().await.expect("a browser that lives").expect("a browser that speaks");
                let Ok(said) = serde_json::from_str::<Json>(said.to_text().unwrap_or_default()) else { continue };
                if said["id"] == id {
                    return said;
                }
                self.events.push(said);
            }
        });
        let mut answer = answer.await.unwrap_or_else(|_| panic!("the browser does not answer {method}"));
        if answer["error"].is_null() { Ok(answer["result"].take()) } else { Err(answer["error"].take()) }
    }

    /// Opens a page, and waits until it is loaded.
    pub async fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
        self.until(&format!("document.readyState == 'complete' && location.href == {}", json!(url))).await;
    }

    /// What an expression is in the page; promises are waited for.
    ///
    /// # Panics
    ///
    /// When it throws.
    pub async fn evaluate(&mut self, expression: &str) -> Json {
        self.try_evaluate(expression).await.unwrap_or_else(|error| panic!("{expression}: {error}"))
    }

    async fn try_evaluate(&mut self, expression: &str) -> Result<Json, Json> {
        let how = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut result = self.ask("Runtime.evaluate", how).await?;
        match result["exceptionDetails"].take() {
            Json::Null => Ok(result["result"]["value"].take()),
            thrown => Err(thrown),
        }
    }

    /// Waits until an expression is true in the page; while it throws it is not.
    ///
    /// # Panics
    ///
    /// When it is not within thirty seconds.
    pub async fn until(&mut self, expression: &str) {
        for _ in 0..600 {
            if self.try_evaluate(&format!("Boolean({expression})")).await == Ok(Json::Bool(true)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not within thirty seconds: {expression}");
    }

    /// Presses a key and lets it go, by its name: `Tab`, `Enter`, `Escape`, `ArrowDown`, or a letter.
    pub async fn press(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "ArrowUp" => 38,
            "ArrowDown" => 40,
            _ => key.bytes().next().map_or(0, |byte| byte.to_ascii_uppercase().into()),
        };
        let text = if key == "Enter" {
            "\r"
        } else if key.len() == 1 {
            key
        } else {
            ""
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// Makes the page believe that whoever looks at it prefers this, such as `prefers-color-scheme` `dark`.
    pub async fn prefer(&mut self, feature: &str, value: &str) {
        self.call("Emulation.setEmulatedMedia", json!({ "features": [{ "name": feature, "value": value }] })).await;
    }

    /// Makes the window so large.
    pub async fn resize(&mut self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
    }

    /// A picture of the window, as PNG.
    ///
    /// # Panics
    ///
    /// When it gives none.
    pub async fn picture(&mut self) -> Vec<u8> {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" })).await;
        let data = shot["data"].as_str().expect("a picture");
        base64::engine::general_purpose::STANDARD.decode(data).expect("base64")
    }

    /// What happened of this kind since the last time it was asked for, such as `Runtime.exceptionThrown`.
    pub fn happened(&mut self, method: &str) -> Vec<Json> {
        let (wanted, others) =
            std::mem::take(&mut self.events).into_iter().partition(|event| event["method"] == method);
        self.events = others;
        wanted
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.process.kill();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
