"""The page's style and its one script."""

from __future__ import annotations

CSS = """
.gradio-container, .gradio-container > .main { padding: 0 !important; }
.gradio-container main { box-sizing: border-box; margin: 0 auto !important; max-width: 72rem !important;
  padding: 1.5rem 1rem !important; width: 100% !important; }
#ph-head, #ph-head .html-container, #ph-results, #ph-results .html-container { padding: 0 !important; }
footer { display: none !important; }
#ph-head h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
#ph-head p { color: var(--body-text-color-subdued); margin: .15rem 0 0; overflow-wrap: anywhere; }
#ph-results { min-height: 6rem; }
.ph-asked, .ph-problem { scroll-margin-top: .75rem; }
.ph-empty { border: 1px dashed var(--border-color-primary); border-radius: var(--radius-lg); padding: 2.5rem 1rem;
  color: var(--body-text-color-subdued); text-align: center; margin: 0; }
.ph-problem { background: #fef2f2; border: 1px solid #fecaca; border-left: 4px solid #dc2626; color: #7f1d1d;
  border-radius: var(--radius-lg); overflow-wrap: anywhere; padding: .8rem 1rem; }
.dark .ph-problem { background: #2a1416; border-color: #7f1d1d; color: #fecaca; }
.ph-asked { align-items: center; display: flex; gap: .75rem; margin: .25rem 0 .85rem; min-width: 0; }
.ph-asked > div { min-width: 0; }
.ph-asked img { background: #fff; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  height: 3rem; object-fit: contain; width: 3rem; flex: none; }
.ph-asked h2 { font-size: 1.1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.ph-note { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; }
.ph-grid { display: grid; gap: .85rem; grid-template-columns: repeat(auto-fill, minmax(min(11.5rem, 100%), 1fr));
  list-style: none; margin: 0; padding: 0; }
.ph-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); display: flex; flex-direction: column; list-style: none; margin: 0; min-width: 0;
  overflow: hidden; }
.ph-card img { background: #fff; border-bottom: 1px solid var(--border-color-primary); box-sizing: border-box;
  display: block; height: 9.5rem; object-fit: contain; padding: .6rem; width: 100%; }
.ph-text { font-size: .92rem; line-height: 1.4; margin: 0; overflow-wrap: anywhere; padding: .65rem .75rem 0; }
.ph-alone { font-size: 1.02rem; padding-top: .85rem; }
.ph-gone { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; padding: .75rem; }
.ph-foot { margin-top: auto; padding: .6rem .75rem .75rem; }
.ph-line { align-items: baseline; display: flex; gap: .5rem; font-size: .8rem; min-width: 0; }
.ph-score { font-variant-numeric: tabular-nums; font-weight: 600; }
.ph-id { color: var(--body-text-color-subdued); min-width: 0; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.ph-foot button { background: none; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md);
  color: var(--body-text-color); cursor: pointer; font-size: .85rem; margin-top: .5rem; padding: .35rem .25rem;
  white-space: nowrap; width: 100%; }
.ph-foot button:hover, .ph-foot button:focus-visible { border-color: var(--color-accent); color: var(--color-accent); }
@media (max-width: 480px) {
  .gradio-container main.contain { padding: 1rem .75rem !important; }
  #ph-head h1 { font-size: 1.3rem; }
  #ph-target label { padding: .35rem .5rem; }
  .ph-grid { gap: .6rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .ph-card img { height: 8rem; }
  .ph-foot { padding: .5rem; }
  .ph-text { padding: .5rem .5rem 0; }
  .ph-foot button { font-size: .8rem; }
}
"""

# The page stays where it is unless the answers would not be seen.
SCRIPT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-place]');
  if (!button) return;
  trigger('again', {place: Number(button.dataset.place), search: button.closest('[data-search]').dataset.search});
});
watch('value', () => {
  const top = element.getBoundingClientRect().top;
  if (top < 0 || top > 0.7 * window.innerHeight) {
    (element.querySelector('.ph-asked, .ph-problem') || element).scrollIntoView({behavior: 'smooth', block: 'start'});
  }
});
"""
